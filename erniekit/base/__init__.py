"""The ground floor: errors, console, environment and files. Knows nothing of models, data or configs."""
