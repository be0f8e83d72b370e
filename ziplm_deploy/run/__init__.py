"""The state of one run: recipe, folder, members, and what several stages need. Only stages know it."""
