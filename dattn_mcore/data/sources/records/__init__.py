"""One module for each form of record that public trainers and data sets use.

Each reads a decoded record of its form into a `Draft` (`draft.py`); `conversation.py` holds the
rules that all share and makes the `Sample`. `forms.py` lists the forms and finds the one of a file.
"""
