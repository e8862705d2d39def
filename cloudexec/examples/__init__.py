"""Small programs over real data, run by the README's commands."""
