"""What training and inference share: the task, its template, examples, their labels, and how answers are judged."""
