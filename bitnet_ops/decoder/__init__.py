"""One decoder for every family: configuration, modules, the plan that runs them, cache and head."""
