"""Other libraries' ways in and out, a module each; it imports its library, and nothing else here does."""
