"""The serving loop that draft and verify service share. No model and no session protocol here."""
