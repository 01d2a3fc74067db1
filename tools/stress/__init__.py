"""Damage streams and kill commands to test that nothing is lost."""
