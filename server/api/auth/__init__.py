"""Better Auth's wire protocol: sign-up, sign-in, sessions, users and API keys."""
