"""What fills a screen: the server at a glance, an instance in full, and how either is kept up to date."""
