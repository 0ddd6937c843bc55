"""Where the data of a project are: archive, restore, hand-over, retention, and arrays that can be recomputed."""
