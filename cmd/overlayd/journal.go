package main

import (
	"strings"

	"github.com/coreos/go-systemd/v22/journal"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"
)

// toJournal reports whether stderr leads to systemd's journal, which takes the priority of a line from its beginning
// (sd-daemon(3)), and has the time of each by itself. That JOURNAL_STREAM is set is not enough: a shell may have
// redirected stderr.
func toJournal() bool {
	is, err := journal.StderrIsJournalStream()
	return is && err == nil
}

// journalLines gives every line of a text the priority of a level: a message, or an error in it, may have several.
func journalLines(level zapcore.Level, text string) string {
	prefix := map[zapcore.Level]string{
		zapcore.DebugLevel: "<7>", zapcore.InfoLevel: "<6>", zapcore.WarnLevel: "<4>", zapcore.ErrorLevel: "<3>",
	}[level]
	if level > zapcore.ErrorLevel {
		prefix = "<2>"
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(prefix + line)
	}
	return b.String()
}

// journalEncoder is an encoder whose lines the journal understands.
type journalEncoder struct {
	zapcore.Encoder
	pool buffer.Pool
}

func (e journalEncoder) Clone() zapcore.Encoder { return journalEncoder{e.Encoder.Clone(), e.pool} }

func (e journalEncoder) EncodeEntry(entry zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	plain, err := e.Encoder.EncodeEntry(entry, fields)
	if err != nil {
		return nil, err
	}
	defer plain.Free()
	out := e.pool.Get()
	out.AppendString(journalLines(entry.Level, plain.String()))
	return out, nil
}
