"""Run configuration: flat YAML in, typed sections out. Plain data that never acts and never imports paddle."""
