"""Mixture-of-Experts: routing, transport, the layer; needs nothing else of the kit but sharding."""
