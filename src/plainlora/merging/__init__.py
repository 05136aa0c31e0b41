"""Adapter -> merged model, with a certificate."""
