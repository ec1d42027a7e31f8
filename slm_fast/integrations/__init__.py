"""What other libraries' files and programs need of this package; each module imports its library inside itself only."""
