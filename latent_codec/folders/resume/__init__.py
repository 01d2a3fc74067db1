"""Remember which outputs of a folder are done, so that an interrupted run goes on."""
