"""Who went where: routing traces, balance, specialization, figures. Nothing trains here."""
