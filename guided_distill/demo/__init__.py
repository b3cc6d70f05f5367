"""A page to play with a bundle: what is drawn (`player`), how it is shown (`page`), and the command."""
