"""Video files: what is in them, which frames are taken, and those frames as tiles.

Only times decide which frame is taken: at t it is the last one that is shown not later than t.
"""
