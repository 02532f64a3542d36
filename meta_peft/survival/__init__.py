"""What lets a run stop at any moment and go on later with the same bits."""
