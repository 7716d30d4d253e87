package bubble

import (
	"sync"
	"testing"
	"time"
)

// The race detector crashes within a second where the bubble has several processors.
func TestTimersThatAreDue(t *testing.T) {
	for range 20 {
		Test(t, func(*testing.T) {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 1000 {
						<-time.NewTimer(0).C
						time.AfterFunc(0, func() {})
					}
				})
			}
			wg.Wait()
		})
	}
}
