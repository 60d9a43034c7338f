"""Images made on the spot: fractals, captioned shapes, digits. With them anything can be tried without a download."""
