package main

import (
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc/grpclog"
)

// What gRPC logs arrives in our log, under one message, and is bounded. Not parallel: gRPC has one logger.
func TestGRPCLogs(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	logGRPC(zap.New(core))
	defer logGRPC(zap.NewNop())
	for range 100 {
		grpclog.Errorf("a connection to %s", "etcd")
		grpclog.Warningln("an attempt", "failed")
		grpclog.Info("a state")
	}
	count := map[zapcore.Level]int{}
	for _, l := range logs.All() {
		if l.Message != grpcSays {
			t.Errorf("the message is %q", l.Message)
		}
		count[l.Level]++
	}
	if count[zap.WarnLevel] != grpcMost || count[zap.DebugLevel] != grpcMost || len(count) != 2 {
		t.Errorf("of each of two levels %d lines were expected: %v", grpcMost, count)
	}
	if text := logs.FilterLevelExact(zap.WarnLevel).All()[0].ContextMap()["text"]; text != "a connection to etcd" {
		t.Errorf("it says %q", text)
	}
}
