"""What a run is and what it leaves: its recipe, its figures, its folder, pictures of one and of many."""
