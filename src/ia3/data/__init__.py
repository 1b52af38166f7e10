"""From files and data sets to examples: rows of a table, then texts with their answers."""
