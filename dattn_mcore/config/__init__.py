"""Settings of a run: typed, loaded from YAML and the command line, checked."""
