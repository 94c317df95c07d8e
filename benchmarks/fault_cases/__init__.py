"""What goes wrong in benchmarks/faults.py, a file a kind."""
