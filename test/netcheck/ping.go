package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/overlayd/overlayd/internal/ping"
)

// replyWait is how long the last request may take: what is answered later is lost. A machine that stands still for some
// seconds loses nothing.
const replyWait = 15 * time.Second

// stream pings an address, as often as the options say or until stdin ends, and prints what came of it.
func stream(to string, df bool, o ping.Options) error {
	var err error
	if o.To, err = netip.ParseAddr(to); err != nil {
		return err
	}
	if o.PMTU = ping.Fragment; df {
		o.PMTU = ping.DontFragment
	}
	s, err := ping.Start(context.Background(), o)
	if err != nil {
		return err
	}
	if o.Count == 0 {
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
	for s.Stats(time.Time{}, time.Now()).Sent < o.Count {
		time.Sleep(5 * time.Millisecond)
	}
	out := s.Stop(replyWait)
	fmt.Printf("sent %d lost %d gap %s", out.Sent, out.Lost, out.Gap)
	if out.Err != nil {
		fmt.Printf(", the last one refused: %v", out.Err)
	}
	fmt.Println()
	return nil
}
