"""People's judgements: what is asked, who answers, where the answers are kept, and how far people agree."""
