package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc/grpclog"
	"k8s.io/klog/v2"
)

// Errors of gRPC and client-go arrive in our log, and are bounded, whatever they say. Not parallel: each has one logger.
func TestLibraryLogs(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	logLibraries(zap.New(core))
	defer logLibraries(zap.NewNop())
	for i := range 100 {
		grpclog.Errorf("connection %d", i)
		grpclog.Warningln("an attempt", "failed")
		grpclog.Info("a state")
		klog.ErrorS(errors.New("refused"), fmt.Sprintf("connection %d", i), "attempt", i)
		klog.Warningf("warning %d", i)
		klog.InfoS("a state")
	}
	for _, message := range []string{"gRPC reports an error", "client-go reports an error"} {
		errors := logs.FilterMessage(message).FilterLevelExact(zap.ErrorLevel)
		if errors.Len() != 5 || logs.Len() != 10 {
			t.Fatalf("%s: %d errors in %d lines: %v", message, errors.Len(), logs.Len(), logs.All())
		}
		for i, l := range errors.All() {
			fields := l.ContextMap()
			if text := fields["text"]; text != fmt.Sprintf("connection %d", i) {
				t.Errorf("%s: line %d says %q", message, i, text)
			}
			if strings.HasPrefix(message, "client-go") && (fmt.Sprint(fields["attempt"]) != fmt.Sprint(i) || fields["error"] != "refused") {
				t.Errorf("line %d has the fields %v", i, fields)
			}
		}
	}
}
