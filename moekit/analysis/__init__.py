"""Who went where: routing traces, balance, specialization, and their figures. Nothing trains here."""
