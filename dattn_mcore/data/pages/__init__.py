"""Pages for people: what a data set holds (`stats`), what the model sees of it (`preview`)."""
