"""From executed chapters to the static book."""
