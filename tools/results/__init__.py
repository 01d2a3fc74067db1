"""Write the page of results from measurements."""
