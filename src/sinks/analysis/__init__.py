"""Looks: measures of attention sinks and of what comes with them; read-only, except for reversible interventions."""
