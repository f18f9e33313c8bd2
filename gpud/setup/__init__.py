"""The host changes that handing cards to guests needs: planned, made, and taken back again."""
