package bench

import "context"

func start(context.Context, *Env) error { return nil }
