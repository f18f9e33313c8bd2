"""Images fit to be cloned: what is inside one, whether it may be sold, and making it so."""
