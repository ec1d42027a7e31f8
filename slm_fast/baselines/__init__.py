"""Other ways to learn a stream of tasks, to compare with: one file a method."""
