"""What an encoder is trained for: the contract of an objective, the table of kinds, and a folder for each kind."""
