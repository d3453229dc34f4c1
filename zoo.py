"""Seven more routing systems, each rebuilt small behind the router interface (gates.Router). ../shared/SEEDS.md"""
KINDS = {}
