"""From one precision to another: a graph whose types are those that are computed in."""
