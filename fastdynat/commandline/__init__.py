"""The commands: flags -> configuration -> run. Parsing needs no torch; each command imports what runs where it runs."""
