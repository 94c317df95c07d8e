"""Media that samples show beside text: how their files are probed and read."""
