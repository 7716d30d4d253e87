package main

import (
	"time"

	"github.com/go-logr/zapr"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zapgrpc"
	"google.golang.org/grpc/grpclog"
	"k8s.io/klog/v2"
)

// logLibraries has gRPC, which connects to etcd, and client-go, which connects to Kubernetes, log here. Each has one
// logger for the process, which is why this is called at the start and nowhere else. What a request fails for reaches
// its caller as an error: errors that only the library knows of are few.
func logLibraries(log *zap.Logger) {
	grpclog.SetLoggerV2(zapgrpc.NewLogger(fewErrors(log, "gRPC reports an error").Named("grpc")))
	klog.SetLogger(zapr.NewLogger(fewErrors(log, "client-go reports an error").Named("client-go")))
}

// fewErrors logs errors, a few each minute, under one message.
func fewErrors(log *zap.Logger, message string) *zap.Logger {
	const window, most = time.Minute, 5 // lines in that time
	few := zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return oneMessage{zapcore.NewSamplerWithOptions(c, window, most, 0), message}
	})
	return log.WithOptions(few, zap.IncreaseLevel(zap.ErrorLevel))
}

// oneMessage logs all under one message: the sampler counts the lines of each message for itself.
type oneMessage struct {
	zapcore.Core
	message string
}

func (c oneMessage) With(fields []zapcore.Field) zapcore.Core {
	return oneMessage{c.Core.With(fields), c.message}
}

func (c oneMessage) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	text := zap.String("text", e.Message)
	e.Message = c.message
	return c.Core.With([]zapcore.Field{text}).Check(e, ce)
}
