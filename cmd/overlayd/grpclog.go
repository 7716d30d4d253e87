package main

import (
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc/grpclog"
)

const (
	grpcSays  = "gRPC message"
	grpcEvery = time.Minute
	grpcMost  = 5 // lines in that time
)

// logGRPC has gRPC, which connects to etcd, log here. It has one logger for the process, which is why this is called at
// the start and nowhere else. What a request fails for reaches its caller as an error: these lines are for looking
// closer, and few.
func logGRPC(log *zap.Logger) {
	grpclog.SetLoggerV2(grpcLog{log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, grpcEvery, grpcMost, 0)
	}))})
}

// grpcLog is a logger as gRPC wants one. Its informations and warnings (each connection, each attempt) are for
// debugging.
type grpcLog struct{ log *zap.Logger }

func (g grpcLog) debug(text string) { g.log.Debug(grpcSays, zap.String("text", text)) }
func (g grpcLog) warn(text string)  { g.log.Warn(grpcSays, zap.String("text", text)) }

func (g grpcLog) Info(args ...any)                    { g.debug(fmt.Sprint(args...)) }
func (g grpcLog) Infoln(args ...any)                  { g.debug(fmt.Sprint(args...)) }
func (g grpcLog) Infof(format string, args ...any)    { g.debug(fmt.Sprintf(format, args...)) }
func (g grpcLog) Warning(args ...any)                 { g.debug(fmt.Sprint(args...)) }
func (g grpcLog) Warningln(args ...any)               { g.debug(fmt.Sprint(args...)) }
func (g grpcLog) Warningf(format string, args ...any) { g.debug(fmt.Sprintf(format, args...)) }
func (g grpcLog) Error(args ...any)                   { g.warn(fmt.Sprint(args...)) }
func (g grpcLog) Errorln(args ...any)                 { g.warn(fmt.Sprint(args...)) }
func (g grpcLog) Errorf(format string, args ...any)   { g.warn(fmt.Sprintf(format, args...)) }

// gRPC expects the process to end by these.
func (g grpcLog) Fatal(args ...any)                 { g.fatal(fmt.Sprint(args...)) }
func (g grpcLog) Fatalln(args ...any)               { g.fatal(fmt.Sprint(args...)) }
func (g grpcLog) Fatalf(format string, args ...any) { g.fatal(fmt.Sprintf(format, args...)) }

func (g grpcLog) fatal(text string) {
	g.log.Error(grpcSays, zap.String("text", text))
	os.Exit(exitFailure)
}

// V is for what gRPC tells beyond that, whatever GRPC_GO_LOG_VERBOSITY_LEVEL says.
func (grpcLog) V(level int) bool { return level <= 0 }
