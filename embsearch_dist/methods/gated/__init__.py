"""Methods that weigh embedding columns row by row: iHAS's gates, AdaFS's controller."""
