"""Products with whole blocks of a weight: those that gates leave open (K3), those a mask keeps (K5, K6, K11)."""
