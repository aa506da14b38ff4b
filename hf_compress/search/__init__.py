"""The search for widths: levels and costs, errors and scores, solver and evolution."""
