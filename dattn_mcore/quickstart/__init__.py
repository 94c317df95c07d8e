"""`make quickstart`: the whole path on the digits task, each step a command a user could type."""
