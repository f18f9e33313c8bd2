"""What an operator has to mend before this server sells: ``gpud doctor``."""
