"""What to do with the layers in a project of one's own: one script a file, each runs by itself."""
