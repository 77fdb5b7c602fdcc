"""The SuperLink of a deployment: one state, a public door for data holders and a private one for the coordinator."""
